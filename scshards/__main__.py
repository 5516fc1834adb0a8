"""`python -m scshards`, so that `torchrun -m scshards train ...` works."""

from scshards.cli import main

if __name__ == "__main__":
    main()
