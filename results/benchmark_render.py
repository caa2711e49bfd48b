"""Milliseconds a page at the four sizes: python results/benchmark_render.py FILE, in pages of 4500 characters of it."""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from render import render_page                                # noqa: E402

if __name__ == '__main__':
    text = Path(sys.argv[1]).read_text(encoding='utf-8')
    pages = [text[i:i + 4500] for i in range(0, len(text), 4500)]
    for size in (512, 640, 1024, 1280):
        start = time.perf_counter()
        for page in pages:
            render_page(page, size)
        print(f'{size} pixels: {1e3 * (time.perf_counter() - start) / len(pages):.1f} ms a page, {len(pages)} pages')
