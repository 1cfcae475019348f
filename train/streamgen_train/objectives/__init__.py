"""One file per objective: a dataclass `Config` and `build(config) -> Objective`."""
