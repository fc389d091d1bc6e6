"""From raw folders to checked tables and fast stores. Imports only `hilum.core`; the table half imports no torch."""
