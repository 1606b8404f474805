"""The page as a folder of files that runs in the browser alone: ``overlock demo --export DIR``."""
