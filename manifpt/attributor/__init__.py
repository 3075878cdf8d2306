"""The attributor: who made this image?"""
