"""A talk in the terminal, with any model of a running server: `python examples/small_talk.py [MODEL] [ADDRESS]`."""

import sys

from openai import APIError, OpenAI

model = sys.argv[1] if len(sys.argv) > 1 else "base"  # 누가 대답할지: base, 런 이름, auto, mix:polite=0.7,casual=0.3
address = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{address}/v1", api_key="none")  # 서버에 키가 없으면 아무 말이나 괜찮다
talk: list = []
while True:
    try:
        said = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        break  # Ctrl-D 로 끝낸다
    if not said:
        continue
    talk.append({"role": "user", "content": said})
    answer = ""
    try:  # 긴 대화는 서버가 오래된 차례부터 덜어 낸다
        options = {"stream": True, "extra_body": {"maltu": {"truncation": "auto"}}}
        for chunk in client.chat.completions.create(model=model, messages=talk, **options):
            piece = chunk.choices[0].delta.content or ""
            answer += piece
            print(piece, end="", flush=True)  # 조각이 오는 대로 보여 준다
        print()
        talk.append({"role": "assistant", "content": answer})
    except APIError as error:
        print(f"\n{error.message}")
        talk.pop()  # 대답을 못 받은 말은 다시 물을 수 있게 뺀다
