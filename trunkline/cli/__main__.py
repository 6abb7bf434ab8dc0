"""`python -m trunkline.cli`."""

from trunkline.cli.app import main

if __name__ == "__main__":
    main()
