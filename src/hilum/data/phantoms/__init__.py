"""Synthetic patients: an attenuation model of the thorax, each CXR-LT finding drawn as its own sign.

anatomy -> canvas (projection) -> skeleton + signs -> exposure -> render (a study in memory) -> layouts (files).
"""
