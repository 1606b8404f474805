"""The ablations trained: every row of a table by one recipe, with several seeds, and the table of what came out."""
