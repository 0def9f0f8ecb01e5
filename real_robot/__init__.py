"""What moves: the bridge to real robots. Its parts come with the issue that asks for them."""
