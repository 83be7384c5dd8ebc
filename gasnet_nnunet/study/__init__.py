"""Studies: what is compared (`definition`, `file`), on which cases (`splits`, `workspace`), and how it is run and told.

`prepare` makes the datasets and plans, `runner` does the `steps` of each run here and `slurm` on a cluster, and
`report` writes the tables and figures.
"""
