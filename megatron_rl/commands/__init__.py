"""Work of the command line's verbs beside training: conversion, pools, presampling."""
