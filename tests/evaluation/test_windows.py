"""Which tokens are read and which count, in both protocols."""

import pytest

from alibi_hf import AlibiError
from alibi_hf.evaluation.windows import check_stride, make_region, make_windows

LENGTHS = [8, 12, 31, 64]


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
@pytest.mark.parametrize("tokens", [64, 65, 127, 128, 300])
def test_sliding_windows_predict_the_same_tokens_at_every_length(tokens: int, stride: int | None) -> None:
    region = make_region(tokens, LENGTHS, stride)
    assert region.stop == tokens // 64 * 64 and region.first == 64 - (stride or 32)
    for length in LENGTHS:
        windows = make_windows("sliding", length, region, stride)
        predicted = [token for window in windows for token in range(window.first, window.stop)]
        assert predicted == list(range(region.first, region.stop))
        step = stride or length // 2
        for window in windows:
            assert window.start >= 0 and window.stop - window.start == length
            assert window.first - window.start >= length - step  # context of the first that is predicted


@pytest.mark.parametrize("tokens", [64, 127, 300])
def test_non_overlapping_windows_cover_what_the_longest_covers(tokens: int) -> None:
    region = make_region(tokens, LENGTHS)
    for length in LENGTHS:
        windows = make_windows("non-overlapping", length, region)
        assert [(window.start, window.stop) for window in windows] == [
            (start, start + length) for start in range(0, len(windows) * length, length)
        ]
        assert all(window.first == window.start + 1 for window in windows)
        assert 0 <= region.stop - windows[-1].stop < length


def test_a_stride_needs_a_token_before_it() -> None:
    check_stride([8, 64], 7)
    for stride in (0, -1, 8, 100):
        with pytest.raises(AlibiError, match=f"a stride of {stride} does not fit windows of 8"):
            check_stride([8, 64], stride)
