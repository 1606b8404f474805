"""The fused network: modules, operators and plans of kernel calls in place of the layers."""
