"""`python -m memopt`."""

from memopt.cli import main

if __name__ == "__main__":
    main()
