"""DPO with its reference, measured."""

from training import main

if __name__ == "__main__":
    main(__doc__, "dpo")
