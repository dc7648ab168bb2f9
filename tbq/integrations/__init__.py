"""Formats inside other people's libraries, each in a module that imports the library it is for.

They stand above `gguf_io`, which knows what a fork's graph does to a row before it is stored;
nothing of this project imports them.
"""
