"""pmm's command line."""


def main() -> None: ...
