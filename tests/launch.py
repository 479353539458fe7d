"""The target of a forked rank. Light to import: only the fork server has Megatron in memory (tests/zygote.py)."""


def run_rank(argv: list[str], environment: dict[str, str], log: str) -> None:
    import zygote

    zygote.run_rank(argv, environment, log)
