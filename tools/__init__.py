"""The programs. Installed under the import name `tbq_tools`."""
