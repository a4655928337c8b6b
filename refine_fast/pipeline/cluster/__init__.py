"""The workers of a run that is spread over processes: ``--engine ray``."""
