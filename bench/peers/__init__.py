"""`python -m bench peers`: the same work by every library that one might take instead, and by ours."""
