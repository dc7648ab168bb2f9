"""The families of formats: one module each, holding layout, constants, specification, entries."""
