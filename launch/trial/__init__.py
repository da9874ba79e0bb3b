"""The recipe of `klreg smoke`, in a folder of its own: that folder is on the path of its runs."""
