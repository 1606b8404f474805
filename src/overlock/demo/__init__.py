"""A page in the browser to look at photos through a network: ``overlock demo``."""
