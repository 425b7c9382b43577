"""The command line; it imports the library, never the other way round."""
