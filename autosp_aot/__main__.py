"""`python -m autosp_aot` is `autosp-aot`."""

from autosp_aot.commands.cli import main

if __name__ == "__main__":
    main()
