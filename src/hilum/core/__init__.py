"""What every layer uses: errors, names, configuration, seeds, files, processes. Imports nothing of Hilum above it."""
