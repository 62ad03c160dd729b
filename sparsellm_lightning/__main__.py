"""``python -m sparsellm_lightning`` is ``sparsellm``."""

from sparsellm_lightning.cli import main

if __name__ == "__main__":
    main()
