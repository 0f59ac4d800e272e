"""Side-by-side timings: candidates are measured in one process, interleaved, after their results were compared."""
