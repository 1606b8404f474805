"""What the networks cost."""

from overlock.analysis.cost import Cost, count_cost

__all__ = ["Cost", "count_cost"]
