"""hasten beside other engines: same weights, same prompts, same threads, in turn. See benchmarks/README.md, "Peers"."""
