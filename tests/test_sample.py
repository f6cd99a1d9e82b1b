"""sample.py as people use it."""
import json
import os
import select
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run, run_here

try:
    import pty
except ImportError:  # Windows
    pty = None

LINE = '-' * 15 + '\n'


def sample(trained, *args, **kw):
    return run_here('sample.py', f'--out_dir={trained}', '--device=cpu', *args, **kw)


def test_prompt_continuation_and_line_per_sample(trained):
    out = sample(trained, '--start=12 and 13', '--num_samples=3', '--max_new_tokens=40')
    samples = out.stdout.split(LINE)
    assert len(samples) == 4 and samples[-1] == '' and all(s.startswith('12 and 13') for s in samples[:3])
    assert all(len(s) == 9 + 40 + 1 for s in samples[:3]) and len(set(samples)) > 2
    assert 'ckpt.pt, iteration 60, best val loss' in out.stderr and 'characters' in out.stderr
    assert sample(trained, '--start=12 and 13', '--num_samples=3', '--max_new_tokens=40').stdout == out.stdout  # the seed decides
    assert sample(trained, '--start=12 and 13', '--num_samples=3', '--max_new_tokens=40', '--seed=2').stdout != out.stdout


def test_samples_by_the_checkpoint_alone(trained, tmp_path):
    # the character table travels in the checkpoint: no data folder is looked for
    os.makedirs(tmp_path / 'elsewhere')
    os.link(os.path.join(trained, 'ckpt.pt'), tmp_path / 'elsewhere' / 'ckpt.pt')
    assert run('sample.py', '--out_dir=elsewhere', '--num_samples=1', '--max_new_tokens=5', cwd=tmp_path).stdout.endswith(LINE)


def test_greedy_does_not_depend_on_seed_batch_or_streaming(trained):
    args = ['--start=7 and', '--temperature=0', '--max_new_tokens=50', '--dtype=float32']  # beyond the block of 32
    one = sample(trained, *args, '--num_samples=1').stdout
    assert sample(trained, *args, '--num_samples=2', '--seed=5').stdout == 2 * one
    assert sample(trained, *args, '--num_samples=2', '--stream').stdout == 2 * one


@pytest.mark.slow
def test_compiled_it_writes_the_same(trained):
    args = ['--start=7 and', '--temperature=0', '--max_new_tokens=50', '--dtype=float32', '--num_samples=1']
    assert sample(trained, *args, '--compile=True').stdout == sample(trained, *args).stdout


def test_stop_texts(trained):
    args = ['--start=7 and', '--temperature=0', '--max_new_tokens=50', '--num_samples=2', '--dtype=float32']
    whole = sample(trained, *args).stdout.split(LINE)[0].rstrip('\n')
    first = whole.index('\n', 5)
    for flags in (['--stop="\\n"'], [r"--stop=['zzz', '\n']"], [r"--stop=['\n', 'and zzz']", '--stream']):
        assert sample(trained, *args, *flags).stdout == 2 * (whole[:first] + '\n' + LINE)
    some = whole[8:12]
    assert sample(trained, *args, f'--stop={some}').stdout.split('\n')[0] == (whole[:5] + whole[5:][:whole[5:].index(some)]).split('\n')[0]


def test_prompts_from_files(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('1 and 2\n3')
    assert sample(trained, '--start=FILE:prompt.txt', '--num_samples=1', '--max_new_tokens=0', cwd=tmp_path).stdout == '1 and 2\n3\n' + LINE
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'latin.txt').write_bytes(b'\xe9t\xe9')
    for name, words in (('none.txt', 'cannot be read'), ('empty.txt', 'empty'), ('latin.txt', 'not UTF-8')):
        assert words in sample(trained, f'--start=FILE:{name}', cwd=tmp_path, ok=False).stderr


@pytest.mark.parametrize('flag, words', [
    ('--start=12 & 13', "characters '&' are not in the vocabulary"), ('--temperature=-1', 'temperature=-1'), ('--top_k=-1', 'top_k=-1'),
    ('--top_p=0', 'top_p=0'), ('--top_p=1.1', 'top_p=1.1'), ('--num_samples=0', 'num_samples=0'), ('--max_new_tokens=-1', 'max_new_tokens=-1'),
    ('--stop=[1]', 'stop='), ('--compile=fast', 'compile='), ('--init_from=gpt9', "'gpt9'"), ('--out_dir=nowhere', 'no checkpoint'), ('--start=', 'empty'),
])
def test_mistakes(trained, flag, words):
    assert words in sample(trained, flag, ok=False).stderr


def test_options_reach_the_sampling(trained):
    args = ['--start=7 and', '--num_samples=1', '--max_new_tokens=40', '--dtype=float32']
    greedy = sample(trained, *args, '--temperature=0').stdout
    assert sample(trained, *args, '--top_k=1').stdout == greedy and sample(trained, *args, '--top_p=1e-9').stdout == greedy
    assert sample(trained, *args, '--top_k=0', '--temperature=5').stdout != greedy


def test_padded_ids_are_never_drawn(tmp_path):
    # an embedding of 64 rows for 3 characters, whose untrained rows are far the likeliest
    from checkpoint import save
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(8, 64, 1, 1, 8, 0.0, False))
    model.transformer.wte.weight.data[3:] *= 100
    args = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False, vocab_size=64, dropout=0.0)
    meta = {'vocab_size': 3, 'stoi': {'a': 0, 'b': 1, 'c': 2}, 'itos': {0: 'a', 1: 'b', 2: 'c'}}
    save(dict(model=model.state_dict(), model_args=args, iter_num=0, meta=meta), str(tmp_path))
    out = sample(tmp_path, '--start=a', '--num_samples=20', '--max_new_tokens=20').stdout
    assert set(out) == set('abc\n-')


def test_a_long_prompt_is_printed_whole(trained):
    prompt = '1 and 2 make 3. ' * 4
    out = sample(trained, f'--start={prompt}', '--num_samples=1', '--max_new_tokens=3')
    assert out.stdout.startswith(prompt) and 'sees its last 32' in out.stderr


def test_characters_beyond_a_token(tmp_path, bpe):
    # a character that GPT-2 has no token for: a model that says its two parts in turn, by the position
    from checkpoint import save
    from model import GPT, GPTConfig
    from tokenizer import GPT2Tokenizer
    character = '\u65e5'
    a, b = ids = GPT2Tokenizer().encode(character)
    model = GPT(GPTConfig(16, 50304, 1, 1, 8, 0.0, False))
    for p in model.parameters():
        p.data.zero_()
    model.transformer.ln_f.weight.data.fill_(1)
    model.transformer.wte.weight.data[ids] = torch.eye(8)[:2]
    model.transformer.wpe.weight.data[0::2, 1] = model.transformer.wpe.weight.data[1::2, 0] = 10
    args = dict(n_layer=1, n_head=1, n_embd=8, block_size=16, bias=False, vocab_size=50304, dropout=0.0)
    save(dict(model=model.state_dict(), model_args=args, iter_num=0), str(tmp_path))
    flags = [f'--start={character}', '--temperature=0', '--num_samples=1', '--dtype=float32']
    for how in ([], ['--stream'], ['--stop=x']):
        assert sample(tmp_path, *flags, *how, '--max_new_tokens=10').stdout == 6 * character + '\n' + LINE
    # one token fewer ends within the character: whole, it shows as U+FFFD; streamed, it isn't shown
    assert sample(tmp_path, *flags, '--max_new_tokens=9').stdout == 5 * character + '\ufffd\n' + LINE
    assert sample(tmp_path, *flags, '--max_new_tokens=9', '--stream').stdout == 5 * character + '\n' + LINE


def test_lines_of_json(trained):
    args = ['--num_samples=2', '--max_new_tokens=12', '--start=1 and']
    plain = sample(trained, *args).stdout
    lines = [json.loads(line) for line in sample(trained, *args, '--format=jsonl').stdout.splitlines()]
    assert [e['prompt'] + e['text'] for e in lines] == [text.removesuffix('\n') for text in plain.split(LINE)[:-1]]
    assert [e['stopped'] for e in lines] == [False, False]
    first = json.loads(sample(trained, *args, '--format=jsonl', f'--stop={lines[0]["text"][3:5]}').stdout.splitlines()[0])
    assert first['stopped'] and first['text'] == lines[0]['text'][:lines[0]['text'].index(lines[0]['text'][3:5])]
    assert 'use text or jsonl' in sample(trained, '--format=xml', ok=False).stderr


class Terminal:
    """sample.py --interactive at a terminal."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execv(sys.executable, [sys.executable, os.path.join(ROOT, 'sample.py'), '--interactive', *args])
        self.seen = ''

    def until(self, text):
        """What comes up to and with the text."""
        while text not in self.seen:
            assert select.select([self.fd], [], [], 60)[0], self.seen
            self.seen += os.read(self.fd, 4096).decode().replace('\r', '')
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def type(self, text):
        os.write(self.fd, text.encode())


@pytest.mark.skipif(pty is None, reason='needs pseudo-terminals')
def test_interactive(trained):
    greedy = sample(trained, '--start=1 and', '--temperature=0', '--num_samples=1', '--max_new_tokens=20').stdout
    greedy = greedy.removeprefix('1 and').partition('\n' + LINE)[0]
    terminal = Terminal(f'--out_dir={trained}', '--device=cpu', '--max_new_tokens=20', '--dtype=float32')
    assert 'Ctrl-C stops the answer' in terminal.until('> ')
    terminal.type('/temperature 0\n')
    terminal.until('> ')
    terminal.type('1 and\n')
    assert terminal.until('\n> ').replace('\x1b[?2004l', '').partition('\n')[2].startswith(greedy)
    terminal.type('/temperature\n')
    assert 'temperature=0.0' in terminal.until('> ')
    for bad, said in (('/temperature -1', 'error: temperature=-1.0 is out of range'), ('/top_k five', "error: top_k cannot be 'five'"),
                      ('/speed 3', '/temperature 0.5 sets it'), ('1 & 2', "error: characters '&' are not in the vocabulary")):
        terminal.type(bad + '\n')
        assert said in terminal.until('\n> ')
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
    command = [sys.executable, os.path.join(ROOT, 'sample.py'), f'--out_dir={trained}', '--max_new_tokens=1000000', '--stream', '--start=1 and']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(10).startswith('1 and')
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
    assert process.returncode == -signal.SIGINT and 'Traceback' not in err and 'KeyboardInterrupt' not in err


def test_a_terminal_of_few_characters(trained, tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text('\u00e9t\u00e9 ' * 500, encoding='utf-8')
    command = [sys.executable, os.path.join(ROOT, 'data', 'text', 'prepare.py'), f'--input={text}', f'--out_dir={tmp_path / "data"}']
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert not done.returncode and r"3 characters: ' t\xe9'" in done.stdout  # on stdout, which would raise
