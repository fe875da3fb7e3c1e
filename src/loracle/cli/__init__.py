"""The commands: parse, call one function, print.

May import every room; no room imports it.
"""
