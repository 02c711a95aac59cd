"""What the verbs of the command line do that are no training: conversion, pools, presampling."""
