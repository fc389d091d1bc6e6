"""A trained model over HTTP: `hilum serve`. One process for requests and the model, another that decodes.

`app.py` puts the parts together; `gate.py` decides who may ask, `uploads.py` how much may come in, `decoding.py` and
`decode_child.py` turn files into pixels where nothing can be harmed, `work.py` lets them wait in line, `results.py`
remembers a few studies in memory, `routes.py` answers. Nothing here writes a file. docs/reference/security.md names the
threats, and the test of each.
"""
