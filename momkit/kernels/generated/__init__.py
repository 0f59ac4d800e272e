"""Kernels written from a rule's own step: the step's graph, its Triton source, and the ops that run it.

Read in this order: `graph` (what a step is here), `traced`, `lower`, `arithmetic`, `views` (from PyTorch's operations
to it), `program` (what is split), `step_source`, `tile_source`, `loops`, `kernel_source` (from it to Triton), `cache`
(files and modules), `settings` and `ops` (forward, backward, decoding).
"""
