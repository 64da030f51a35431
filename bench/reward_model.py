"""Bradley-Terry reward-model training, measured."""

from training import main

if __name__ == "__main__":
    main(__doc__, "bradley-terry")
