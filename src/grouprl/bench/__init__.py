"""Many runs, as rows: benchmarks, sweeps, and the tables and figures of either. Both arenas."""
