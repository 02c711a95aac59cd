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


def test_what_was_put_back_comes_first_and_nothing_is_lost_or_doubled() -> None:
    whole = Stream(range(7), seed=1, shuffle=True).take(9)
    stream = Stream(range(7), seed=1, shuffle=True)
    assert stream.take(5) == whole[:5]
    stream.put_back([1, 4])
    resumed = Stream(range(7), seed=1, shuffle=True)
    resumed.load_state(stream.state())
    for each in (stream, resumed):
        assert each.take(1) == [whole[1]]
        assert each.take(5) == [whole[4], *whole[5:9]]


def test_an_item_that_comes_twice_in_one_batch_is_put_back_once() -> None:
    stream = Stream("ab", seed=0, shuffle=False)
    assert stream.take(4) == ["a", "b", "a", "b"]
    stream.put_back([2])
    assert stream.take(2) == ["a", "a"]


def test_unshuffled_is_file_order() -> None:
    assert Stream("abc", seed=0, shuffle=False).take(5) == ["a", "b", "c", "a", "b"]
