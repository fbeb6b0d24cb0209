"""`python -m peft_cast`."""

from .cli import main


if __name__ == "__main__":
    main()
