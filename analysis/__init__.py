"""Laws, fits and figures. Reads tables of results and imports nothing that trains."""
