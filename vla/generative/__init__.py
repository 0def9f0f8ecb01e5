"""Generated subgoals: editors of images, short videos, and the policies that follow them."""
