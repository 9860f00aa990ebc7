"""Claims (paper.yaml), records (one JSON a run), verdicts (computed), tables (generated)."""
