"""A corpus of what goes wrong with model folders: real small folders, and faults planted in them.

Folders are written and read here byte by byte, with NumPy and ml_dtypes, so that what is found is judged by
code which shares nothing with what finds it.
"""
