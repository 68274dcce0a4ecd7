"""Observers that come with dbop_raw: import the one you want by its module."""
