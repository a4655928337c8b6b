"""The report of a run, its figures and the model card."""
