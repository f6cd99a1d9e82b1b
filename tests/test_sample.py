"""sample.py as people use it."""
import json
import os
import random
import select
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run, run_here

from model import GPT, GPTConfig
from runtime.checkpoint import save
from runtime.prompts import TextStream
from runtime.tokenizer import CharTokenizer, GPT2Tokenizer

try:
    import pty
except ImportError:  # Windows
    pty = None

LINE = '-' * 15 + '\n'


def sample(trained, *args, **kw):
    return run_here('sample.py', f'--out_dir={trained}', '--device=cpu', *args, **kw)


def test_prompt_continuation_and_line_per_sample(trained):
    args = ['--start=12 and 13', '--num_samples=3', '--max_new_tokens=40']
    out = sample(trained, *args)
    samples = out.stdout.split(LINE)
    assert len(samples) == 4 and samples[-1] == ''
    assert all(s.startswith('12 and 13') for s in samples[:3])
    assert all(len(s) == 9 + 40 + 1 for s in samples[:3])
    assert len(set(samples)) > 2
    assert 'ckpt.pt, iteration 60, val loss' in out.stderr and 'characters' in out.stderr
    assert sample(trained, *args).stdout == out.stdout  # the seed decides
    assert sample(trained, *args, '--seed=2').stdout != out.stdout


def test_a_checkpoint_is_enough_to_sample(trained, tmp_path):
    # the table of characters is in the checkpoint: no data folder is looked for
    os.makedirs(tmp_path / 'elsewhere')
    os.link(os.path.join(trained, 'ckpt.pt'), tmp_path / 'elsewhere' / 'ckpt.pt')
    out = run('sample.py', '--out_dir=elsewhere', '--num_samples=1', '--max_new_tokens=5',
              cwd=tmp_path).stdout
    assert out.endswith(LINE)


def test_greedy_does_not_depend_on_seed_batch_or_streaming(trained):
    # beyond the block of 32
    args = ['--start=7 and', '--temperature=0', '--max_new_tokens=50', '--dtype=float32']
    one = sample(trained, *args, '--num_samples=1').stdout
    assert sample(trained, *args, '--num_samples=2', '--seed=5').stdout == 2 * one
    assert sample(trained, *args, '--num_samples=2', '--stream').stdout == 2 * one


@pytest.mark.slow
def test_compiled_it_writes_the_same(trained):
    args = ['--start=7 and', '--temperature=0', '--max_new_tokens=50', '--dtype=float32',
            '--num_samples=1']
    assert sample(trained, *args, '--compile=True').stdout == sample(trained, *args).stdout


def test_stop_texts(trained):
    args = ['--start=7 and', '--temperature=0', '--max_new_tokens=50', '--num_samples=2',
            '--dtype=float32']
    whole = sample(trained, *args).stdout.split(LINE)[0].rstrip('\n')
    first = whole.index('\n', 5)
    for flags in (['--stop="\\n"'], [r"--stop=['zzz', '\n']"],
                  [r"--stop=['\n', 'and zzz']", '--stream']):
        assert sample(trained, *args, *flags).stdout == 2 * (whole[:first] + '\n' + LINE)
    some = whole[8:12]
    end = whole.index(some, 5)
    out = sample(trained, *args, f'--stop={some}').stdout
    assert out.split('\n')[0] == whole[:end].split('\n')[0]


@pytest.mark.parametrize('stop', [
    '', '1', 'and', ' m', r"['\n', ' make ']", "['zzz', 'e 1', 'ake 1']", 'never in the text'])
def test_a_stream_with_stop_texts_writes_what_a_batch_does(trained, stop):
    args = ['--start=7 and', '--temperature=0', '--max_new_tokens=50', '--dtype=float32',
            f'--stop={stop}', '--num_samples=2']
    batch = sample(trained, *args).stdout
    assert sample(trained, *args, '--stream').stdout == batch
    texts = [json.loads(line)['text']
             for line in sample(trained, *args, '--format=jsonl').stdout.splitlines()]
    assert ''.join(f'7 and{text}\n{LINE}' for text in texts) == batch
    whole = sample(trained, *args, '--stop=').stdout
    assert (batch != whole) == (stop not in ('', 'never in the text'))


def end_at_stop(tokenizer, ids, stops):
    """The text of the tokens up to the first that completes a stop text, and if there is one."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        places = [text.index(stop) for stop in stops if stop in text]
        if places:
            return text[:min(places)], True
    return tokenizer.decode(ids), False


def check_streams(tokenizer, ids, stops, rng):
    """Compares a TextStream, whose text is taken at random times, with end_at_stop()."""
    expected_text, expected_end = end_at_stop(tokenizer, ids, stops)
    stream = TextStream(tokenizer, stops)
    printed = ''
    for token in ids:
        stream.add(token)
        if rng.random() < 0.7:
            printed += stream.take()
            assert expected_text.startswith(printed), (printed, expected_text, stops)
    printed += stream.take(all=True)
    assert (printed, stream.text) == (expected_text, expected_text)
    assert stream.is_complete == expected_end


def test_text_streams_of_characters():
    # of two characters, so that stop texts overlap one another and nearly come many times
    tokenizer = CharTokenizer({'stoi': {'a': 0, 'b': 1}, 'itos': {0: 'a', 1: 'b'}})
    rng = random.Random(1337)
    for _ in range(2000):
        ids = rng.choices((0, 1), k=rng.randrange(12))
        stops = [''.join(rng.choices('ab', k=rng.randint(1, 5))) for _ in range(rng.randrange(4))]
        check_streams(tokenizer, ids, stops, rng)


def test_text_streams_of_bpe(bpe):
    # many tokens end within a character, or have the end of one stop text and more
    tokenizer = GPT2Tokenizer()
    text = 'one two, three \u65e5\u672c\u8a9e and \U0001f600\U0001f680 four\n\nfive two, '
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and any('\ufffd' in tokenizer.decode([i]) for i in ids)
    rng = random.Random(1337)
    for _ in range(500):
        stops = []
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(text))
            stops.append(text[place:place + rng.randint(1, 8)] + rng.choice(('', '', 'x')))
        check_streams(tokenizer, ids, stops, rng)


def test_prompts_from_files(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('1 and 2\n3')
    out = sample(trained, '--start=FILE:prompt.txt', '--num_samples=1', '--max_new_tokens=0',
                 cwd=tmp_path).stdout
    assert out == '1 and 2\n3\n' + LINE
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'latin.txt').write_bytes(b'\xe9t\xe9')
    for name, words in (('none.txt', 'cannot be read'), ('empty.txt', 'empty'),
                        ('latin.txt', 'not UTF-8')):
        err = sample(trained, f'--start=FILE:{name}', cwd=tmp_path, ok=False).stderr
        assert words in err


@pytest.mark.parametrize('flag, words', [
    ('--start=12 & 13', "characters '&' are not in the vocabulary"),
    ('--temperature=-1', 'temperature=-1'), ('--top_k=-1', 'top_k=-1'), ('--top_p=0', 'top_p=0'),
    ('--top_p=1.1', 'top_p=1.1'), ('--num_samples=0', 'num_samples=0'),
    ('--max_new_tokens=-1', 'max_new_tokens=-1'), ('--stop=[1]', 'stop='),
    ('--compile=fast', 'compile='), ('--init_from=gpt9', "'gpt9'"),
    ('--out_dir=nowhere', 'does not exist'), ('--start=', 'empty'),
])
def test_mistakes(trained, flag, words):
    assert words in sample(trained, flag, ok=False).stderr


def test_options_reach_the_sampling(trained):
    args = ['--start=7 and', '--num_samples=1', '--max_new_tokens=40', '--dtype=float32']
    greedy = sample(trained, *args, '--temperature=0').stdout
    assert sample(trained, *args, '--top_k=1').stdout == greedy
    assert sample(trained, *args, '--top_p=1e-9').stdout == greedy
    assert sample(trained, *args, '--top_k=0', '--temperature=5').stdout != greedy


def save_model(model, out_dir, **extra):
    """Saves a model of one layer as a checkpoint without an optimizer."""
    c = model.config
    args = dict(n_layer=1, n_head=1, n_embd=8, block_size=c.block_size, bias=False,
                vocab_size=c.vocab_size, dropout=0.0)
    save(dict(model=model.state_dict(), model_args=args, iter_num=0, **extra), str(out_dir))


def test_padded_ids_are_never_drawn(tmp_path):
    # an embedding of 64 rows for 3 characters; the other rows are by far the most likely
    model = GPT(GPTConfig(8, 64, 1, 1, 8, 0.0, False))
    model.transformer.wte.weight.data[3:] *= 100
    meta = {'vocab_size': 3, 'stoi': {'a': 0, 'b': 1, 'c': 2}, 'itos': {0: 'a', 1: 'b', 2: 'c'}}
    save_model(model, tmp_path, meta=meta)
    out = sample(tmp_path, '--start=a', '--num_samples=20', '--max_new_tokens=20').stdout
    assert set(out) == set('abc\n-')


def test_a_long_prompt_is_printed_completely(trained):
    prompt = '1 and 2 make 3. ' * 4
    out = sample(trained, f'--start={prompt}', '--num_samples=1', '--max_new_tokens=3')
    assert out.stdout.startswith(prompt)
    assert 'the model sees only the last 32' in out.stderr


def test_characters_of_several_tokens(tmp_path, bpe):
    # GPT-2 has no token for this character: the model says its two parts in turn, by the position
    character = '\u65e5'
    a, b = ids = GPT2Tokenizer().encode(character)
    model = GPT(GPTConfig(16, 50304, 1, 1, 8, 0.0, False))
    for p in model.parameters():
        p.data.zero_()
    model.transformer.ln_f.weight.data.fill_(1)
    model.transformer.wte.weight.data[ids] = torch.eye(8)[:2]
    model.transformer.wpe.weight.data[0::2, 1] = 10
    model.transformer.wpe.weight.data[1::2, 0] = 10
    save_model(model, tmp_path)
    flags = [f'--start={character}', '--temperature=0', '--num_samples=1', '--dtype=float32']
    for how in ([], ['--stream'], ['--stop=x']):
        out = sample(tmp_path, *flags, *how, '--max_new_tokens=10').stdout
        assert out == 6 * character + '\n' + LINE
    # one token fewer ends within the character. A text made at the end has U+FFFD for it; a
    # stream prints nothing
    out = sample(tmp_path, *flags, '--max_new_tokens=9').stdout
    assert out == 5 * character + '\ufffd\n' + LINE
    out = sample(tmp_path, *flags, '--max_new_tokens=9', '--stream').stdout
    assert out == 5 * character + '\n' + LINE


def test_lines_of_json(trained):
    args = ['--num_samples=2', '--max_new_tokens=12', '--start=1 and']
    texts = sample(trained, *args).stdout.split(LINE)[:-1]
    args.append('--format=jsonl')
    lines = [json.loads(line) for line in sample(trained, *args).stdout.splitlines()]
    assert [e['prompt'] + e['text'] for e in lines] == [text.removesuffix('\n') for text in texts]
    assert [e['stopped'] for e in lines] == [False, False]
    text = lines[0]['text']
    stop = text[3:5]
    first = json.loads(sample(trained, *args, f'--stop={stop}').stdout.splitlines()[0])
    assert first['stopped'] and first['text'] == text[:text.index(stop)]
    assert 'use text or jsonl' in sample(trained, '--format=xml', ok=False).stderr


class Terminal:
    """sample.py --interactive at a terminal."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            script = os.path.join(ROOT, 'sample.py')
            os.execv(sys.executable, [sys.executable, script, '--interactive', *args])
        self.seen = ''

    def until(self, text):
        """What is printed up to the text, and the text."""
        while text not in self.seen:
            assert select.select([self.fd], [], [], 60)[0], self.seen
            self.seen += os.read(self.fd, 4096).decode().replace('\r', '')
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def type(self, text):
        os.write(self.fd, text.encode())


@pytest.mark.skipif(pty is None, reason='needs pseudo-terminals')
def test_interactive(trained):
    greedy = sample(trained, '--start=1 and', '--temperature=0', '--num_samples=1',
                    '--max_new_tokens=20').stdout
    greedy = greedy.removeprefix('1 and').partition('\n' + LINE)[0]
    terminal = Terminal(f'--out_dir={trained}', '--device=cpu', '--max_new_tokens=20',
                        '--dtype=float32')
    assert 'Ctrl-C stops an answer' in terminal.until('> ')
    terminal.type('/temperature 0\n')
    terminal.until('> ')
    terminal.type('1 and\n')
    answer = terminal.until('\n> ').replace('\x1b[?2004l', '').partition('\n')[2]
    assert answer.startswith(greedy)
    terminal.type('/temperature\n')
    assert 'temperature=0.0' in terminal.until('> ')
    for line, words in (('/temperature -1', 'error: temperature=-1.0 must be at least 0'),
                        ('/top_k five', "error: top_k cannot be 'five'"),
                        ('/speed 3', '/temperature 0.5 sets the temperature'),
                        ('1 & 2', "error: characters '&' are not in the vocabulary")):
        terminal.type(line + '\n')
        assert words in terminal.until('\n> ')
    terminal.type('/max_new_tokens 1000000\n')
    terminal.until('> ')
    terminal.type('1 and\n')
    terminal.until('make')
    terminal.type('\x03')  # Ctrl-C: the answer ends, the program doesn't
    terminal.until('> ')
    terminal.type('/max_new_tokens 7\n')
    terminal.until('> ')
    terminal.type('\x1b[A\x1b[A\x1b[A\n')  # /max_new_tokens 1000000, from the history
    terminal.until('> ')
    terminal.type('/max_new_tokens\n')
    assert 'max_new_tokens=1000000' in terminal.until('\n> ')
    terminal.type('/stop \\n\n')
    terminal.until('> ')
    terminal.type('/stop\n')
    assert r"stop='\n'" in terminal.until('\n> ')
    terminal.type('\x04')
    assert os.waitpid(terminal.pid, 0)[1] == 0


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_ctrl_c_is_quiet(trained):
    command = [sys.executable, os.path.join(ROOT, 'sample.py'), f'--out_dir={trained}',
               '--max_new_tokens=1000000', '--stream', '--start=1 and']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.read(10).startswith('1 and')
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
    assert process.returncode == -signal.SIGINT
    assert 'Traceback' not in err and 'KeyboardInterrupt' not in err


def test_a_terminal_of_few_characters(trained, tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text('\u00e9t\u00e9 ' * 500, encoding='utf-8')
    command = [sys.executable, os.path.join(ROOT, 'data', 'text', 'prepare.py'),
               f'--input={text}', f'--out_dir={tmp_path / "data"}']
    result = subprocess.run(command, capture_output=True, text=True,
                            env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    # on stdout, which would raise
    assert not result.returncode and r"3 characters: ' t\xe9'" in result.stdout


def test_a_model_without_a_new_line_begins_with_a_character_that_it_has(tmp_path):
    (tmp_path / 'x.txt').write_text('bcad' * 300)
    run_here('data/text/prepare.py', f'--input={tmp_path / "x.txt"}', f'--out_dir={tmp_path}')
    out = run_here('train.py', *TINY, f'--dataset={tmp_path}', f'--out_dir={tmp_path / "a b"}',
                   '--max_iters=2').stdout
    command = shlex.split(out.partition('sample from it: ')[2])  # the hint works as it stands
    out = run('sample.py', *command[2:], '--num_samples=2', '--max_new_tokens=5')
    assert "the vocabulary has no new line, so the prompt is 'a'" in out.stderr
    samples = out.stdout.split('\n---------------\n')[:2]
    assert all(text.startswith('a') and len(text) == 6 for text in samples)
    err = run('sample.py', *command[2:], '--start=x' + chr(0x4e00) * 9999, ok=False).stderr
    assert 'not in the vocabulary' in err and len(err) < 300


def test_a_prompt_from_notepad_or_from_home(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_bytes(b'\xef\xbb\xbf1 and')
    for path in (tmp_path / 'prompt.txt', '~/prompt.txt'):
        out = run('sample.py', f'--out_dir={trained}', f'--start=FILE:{path}', '--num_samples=1',
                  '--max_new_tokens=2', HOME=str(tmp_path)).stdout
        assert out.startswith('1 and')
