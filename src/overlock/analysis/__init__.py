"""What the networks cost."""

from overlock.analysis.cost import Cost, count_cost, count_network
from overlock.analysis.model_cost import DENSE_TASKS, count_dense_cost

__all__ = ["DENSE_TASKS", "Cost", "count_cost", "count_dense_cost", "count_network"]
