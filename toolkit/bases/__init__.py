"""The models that adapters stand on: known, loaded, or made from scratch."""
