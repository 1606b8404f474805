"""The parts and the backbones in networks that other packages build: docs/frameworks.md."""
