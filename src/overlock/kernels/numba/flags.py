"""What a kernel does beside its own work, in the same pass over memory: flags of its prologue and its epilogue.

The prologue is done to the input as it is read, the epilogue to the result before it is written. Flags are added up;
what they stand for is done in the order below.
"""

SCALE = 1  # prologue: times a scale for each image and channel
GATE = 2  # prologue: times a gate for each number
RESIDUAL = 4  # epilogue: plus a residual, scaled for each channel
SILU = 8  # epilogue
GELU = 16  # prologue or epilogue
GELU_GRADIENT = 32  # epilogue: times the derivative of GELU at other numbers
SUM_SQUARES = 64  # epilogue: sums of the squares of the results too
SUM = 128  # epilogue: sums of the results too
