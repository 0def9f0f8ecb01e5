"""What stands between every policy and every robot."""
