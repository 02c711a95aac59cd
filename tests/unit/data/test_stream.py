from megatron_rl.data.stream import Stream


def test_each_epoch_is_another_permutation() -> None:
    stream = Stream(range(10), seed=3, shuffle=True)
    first, second = stream.take(10), stream.take(10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_the_cursor_is_the_whole_state() -> None:
    whole = Stream(range(7), seed=1, shuffle=True).take(40)
    stream = Stream(range(7), seed=1, shuffle=True)
    stream.take(13)
    resumed = Stream(range(7), seed=1, shuffle=True, cursor=stream.cursor)
    assert resumed.take(27) == whole[13:]


def test_unshuffled_is_file_order() -> None:
    assert Stream("abc", seed=0, shuffle=False).take(5) == ["a", "b", "c", "a", "b"]
