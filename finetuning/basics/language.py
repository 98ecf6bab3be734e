"""English and Korean: every text of the comparison, in one language for the whole process."""

from __future__ import annotations

import argparse
import locale
import os
import re

from finetuning.basics.command_line import can_print

# The keys are the English texts, as in gettext; both texts have the same {placeholders}.
KOREAN = {
    # Before and after the comparison
    "original:": "원본:",
    "fine-tuned:": "파인튜닝:",
    "images:": "이미지:",
    "(SAM 2.1 {name}, as published)": "(공개된 SAM 2.1 {name} 그대로)",
    "(not the published file of SAM 2.1 {name})": "(공개된 SAM 2.1 {name} 파일이 아님)",
    "identical to the original: no epoch of the training was better": (
        "원본과 같습니다. 학습에서 원본보다 나은 에폭이 없었습니다"
    ),
    "not the file that training started from": "학습을 시작한 파일이 아닙니다",
    "both models see images resized to {size}x{size} pixels, as in training; the original's own "
    "size is {own}x{own}": (
        "두 모델 모두 학습할 때처럼 {size}x{size} 픽셀로 줄인 이미지를 봅니다. 원본의 본래 크기는 "
        "{own}x{own}입니다"
    ),
    "(the test split is the default where there is one; --split val: the validation split)": (
        "(테스트 세트가 있으면 그것으로 비교합니다. 검증 세트로 비교하려면 --split val)"
    ),
    "averaging {count} views of each image: encoding takes {count} times as long": (
        "이미지마다 {count}가지 뷰를 평균합니다. 인코딩 시간이 {count}배 걸립니다"
    ),
    "\nwrote {names} and {count} picture(s) to {output}": (
        "\n저장: {names}, 그림 {count}장 (폴더: {output})"
    ),
    # How masks are cleaned
    "the masks of both models are cleaned: {changes}; --clean off leaves them as they are": (
        "두 모델의 마스크를 모두 정리했습니다: {changes}. --clean off로 끌 수 있습니다"
    ),
    "{changes}; without a prompt, {whole}": "{changes}; 프롬프트가 없으면 {whole}",
    "masks keep their largest part and those with a click": "가장 큰 조각과 클릭한 조각만 남김",
    "parts without a click below {share} of the largest are dropped": (
        "클릭하지 않은 조각은 가장 큰 조각의 {share}보다 작으면 지움"
    ),
    "holes up to {share} of the mask are filled": "마스크 면적의 {share} 이하인 구멍을 메움",
    "masks stay as they are": "마스크를 그대로 둠",
    # The box
    "mean IoU ({measured})": "평균 IoU ({measured})",
    "{split}, single mask": "{split}, 단일 마스크",
    "original SAM 2:": "원본 SAM 2:",
    "fine-tuned SAM 2:": "파인튜닝한 SAM 2:",
    "improvement:": "향상:",
    "trained on:": "학습한 이미지:",
    "masks changed:": "바뀐 마스크:",
    "{count} of {images} images": "{images}장 중 {count}장",
    # Sentences
    "{count} images: {better} better, {equal} equal, {worse} worse": (
        "이미지 {count}장: 향상 {better}, 동일 {equal}, 저하 {worse}"
    ),
    "{count} objects in {images} images: {better} better, {equal} equal, {worse} worse": (
        "이미지 {images}장의 객체 {count}개: 향상 {better}, 동일 {equal}, 저하 {worse}"
    ),
    "improvement {gain:+.1f}%p": "향상 {gain:+.1f}%p",
    "95% interval {low:+.1f} to {high:+.1f}": "95% 신뢰구간 {low:+.1f} ~ {high:+.1f}",
    " (paired bootstrap over {images} images)": (
        " (이미지 {images}장을 재표집한 대응표본 부트스트랩)"
    ),
    " (paired bootstrap over {images} images in {groups} groups)": (
        " (이미지 {images}장의 그룹 {groups}개를 재표집한 대응표본 부트스트랩)"
    ),
    "; one image is too few for a confidence interval": (
        ", 이미지가 한 장뿐이어서 신뢰구간을 구할 수 없습니다"
    ),
    "; one group of images is too few for a confidence interval": (
        ", 이미지가 모두 한 그룹이어서 신뢰구간을 구할 수 없습니다"
    ),
    "{count} of these {images} images are frames of recordings that also have frames in train: "
    "neither the numbers nor the interval show how good the model is on other recordings": (
        "이미지 {images}장 중 {count}장은 train에도 프레임이 있는 영상의 프레임입니다. 다른 "
        "영상에서의 성능은 이 수치와 신뢰구간으로 알 수 없습니다"
    ),
    "; it includes 0, so this could be chance": "; 0을 포함하므로 우연일 수 있습니다",
    "; with so few images, the true interval is wider": (
        "; 이미지가 적으므로 실제 구간은 더 넓다고 보아야 합니다"
    ),
    "val: the best epoch was chosen on these images, so this is slightly optimistic; "
    "download_dataset.py --test-fraction 0.1 sets a test split aside": (
        "val: 이 이미지들로 가장 좋은 에폭을 골랐으므로 수치가 조금 후하게 나옵니다. "
        "download_dataset.py에 --test-fraction 0.1을 더하면 평가용 이미지를 따로 떼어 둡니다"
    ),
    "test: no training has read these images, and no epoch was chosen by them": (
        "test: 학습에도, 에폭을 고르는 데에도 쓰지 않은 이미지입니다"
    ),
    "folds: each image was measured by the model that had not seen it, after that model's last "
    "epoch; no epoch was chosen on it": (
        "folds: 각 이미지를 그 이미지를 학습하지 않은 모델의 마지막 에폭으로 평가했습니다"
    ),
    "train: the model was trained on these images": "train: 모델이 이미 학습한 이미지입니다",
    "warning: the model was trained on {count} of these {images} images; these numbers do not show "
    "how good it is on new images": (
        "경고: 이미지 {images}장 중 {count}장은 모델이 이미 학습한 이미지입니다. 새 이미지에서의 "
        "성능은 이 수치로 알 수 없습니다"
    ),
    "the best epoch was chosen on {count} of these {images} images": (
        "이미지 {images}장 중 {count}장은 가장 좋은 에폭을 고르는 데 쓰였습니다"
    ),
    "warning: the masks of {count} of these {images} images have changed since training": (
        "경고: 이미지 {images}장 중 {count}장의 마스크가 학습 이후 바뀌었습니다"
    ),
    "it is not known whether the model was trained on these images: its file, or that of the model "
    "it started from, has no complete record": (
        "모델이 이 이미지들을 학습했는지 확인할 수 없습니다. 모델 파일이나 그 출발 모델의 파일에 "
        "기록이 없습니다"
    ),
    "{count} more images have no object and are not measured": (
        "객체가 없는 이미지 {count}장은 평가하지 않았습니다"
    ),
    "{count} more images have no object; the original finds something in {original} of them, "
    "the fine-tuned model in {finetuned}": (
        "객체가 없는 이미지 {count}장 중 원본은 {original}장, 파인튜닝한 모델은 {finetuned}장에서 "
        "무언가를 찾았습니다"
    ),
    "both models: each mask is the average for {count} mirrored views of the image": (
        "두 모델 모두 이미지를 뒤집은 {count}가지 뷰의 마스크를 평균했습니다"
    ),
    "{count} training runs with different seeds: val IoU best {best:.4f} ± {best_spread:.4f} "
    "({lowest:.4f} to {highest:.4f}), last {last:.4f} ± {last_spread:.4f}; "
    "the 95% interval over images does not include this spread": (
        "시드를 바꾼 학습 {count}회의 검증 IoU(평균 ± 표준편차): 가장 좋은 에폭 "
        "{best:.4f} ± {best_spread:.4f} ({lowest:.4f} ~ {highest:.4f}), 마지막 에폭 "
        "{last:.4f} ± {last_spread:.4f}; 95% 신뢰구간에는 시드에 따른 변동이 반영되어 있지 않습니다"
    ),
    "warning: {path} was not written by train_sam2_proper.py --runs; it is ignored": (
        "경고: {path}는 train_sam2_proper.py --runs가 쓴 파일이 아니므로 무시합니다"
    ),
    # Tables
    "metrics on {count} images": "이미지 {count}장의 평가 지표",
    "metrics on {count} objects": "객체 {count}개의 평가 지표",
    "mean\noriginal": "평균\n원본",
    "mean\nfine-tuned": "평균\n파인튜닝",
    "median\noriginal": "중앙값\n원본",
    "median\nfine-tuned": "중앙값\n파인튜닝",
    "IoU, median per image": "IoU, 이미지별 중앙값",
    "{metrics}: in pixels, lower is better": "{metrics}: 픽셀 단위, 낮을수록 좋음",
    "mean IoU by object size": "객체 크기별 평균 IoU",
    "share of image": "이미지 대비 면적",
    "images": "이미지 수",
    "objects": "객체 수",
    "original": "원본",
    "fine-tuned": "파인튜닝",
    "small": "작음",
    "medium": "중간",
    "large": "큼",
    "below 5%": "5% 미만",
    "5 to 15%": "5~15%",
    "15% or more": "15% 이상",
    "mean IoU by simulated clicks ({how})": "모의 클릭 수에 따른 평균 IoU ({how})",
    "with the previous mask as a prompt": "직전 마스크도 프롬프트로 사용",
    "without a mask prompt": "마스크 프롬프트 없음",
    "clicks": "클릭 수",
    "not reached": "미도달",
    "NoC@85: mean number of clicks to an IoU of 85% "
    "({count} images; not reached counts as {clicks})": (
        "NoC@85: IoU 85%까지의 평균 클릭 수 (이미지 {count}장, 미도달은 {clicks}회로 계산)"
    ),
    "NoC@85: mean number of clicks to an IoU of 85% "
    "({count} objects; not reached counts as {clicks})": (
        "NoC@85: IoU 85%까지의 평균 클릭 수 (객체 {count}개, 미도달은 {clicks}회로 계산)"
    ),
    "objects found without a prompt ({count} objects in {images} images)": (
        "프롬프트 없이 찾은 객체: 이미지 {images}장의 객체 {count}개"
    ),
    "precision": "정밀도",
    "recall": "재현율",
    "F1, mean over images": "F1, 이미지별 평균",
    "masks found": "찾은 마스크 수",
    "that match an object": "그중 객체인 것",
    "minimum score": "최저 점수",
    "minimum area": "최소 면적",
    "a mask matches an object from an IoU of 0.5 on; both thresholds were chosen on training "
    "images": "IoU가 0.5 이상이면 객체로 셉니다. 두 기준값은 학습 이미지에서 골랐습니다",
    # The page
    "SAM 2.1 {size}: original and fine-tuned": "SAM 2.1 {size}: 원본과 파인튜닝한 모델",
    "{images} images": "이미지 {images}장",
    "{objects} objects in {images} images": "이미지 {images}장의 객체 {objects}개",
    "Result": "결과",
    "Original, mean IoU": "원본, 평균 IoU",
    "Fine-tuned, mean IoU": "파인튜닝, 평균 IoU",
    "Improvement": "향상",
    "Numbers": "수치",
    "Chart: IoU of the fine-tuned model against IoU of the original; a dot above the diagonal is "
    "an improvement. Mean IoU {original} and {finetuned}.": (
        "그래프: 가로축은 원본의 IoU, 세로축은 파인튜닝한 모델의 IoU. "
        "대각선보다 위쪽에 있는 점은 향상된 것. 평균 IoU {original}, {finetuned}."
    ),
    "Corrective clicks": "마스크를 고치는 클릭",
    "Chart: mean IoU of both models by number of clicks, as in the table above.": (
        "그래프: 클릭 수에 따른 두 모델의 평균 IoU. 값은 위의 표와 같음."
    ),
    "Objects found without a prompt": "프롬프트 없이 찾은 객체",
    "Images": "이미지",
    "Left: the prompt and the true outline, in yellow. Middle: the original's mask. "
    "Right: the fine-tuned model's mask.": (
        "왼쪽: 프롬프트와 정답 윤곽선(노란색). 가운데: 원본의 마스크. "
        "오른쪽: 파인튜닝한 모델의 마스크."
    ),
    "{name}: the prompt and the true outline, the original's mask, the fine-tuned model's mask": (
        "{name}: 프롬프트와 정답 윤곽선, 원본의 마스크, 파인튜닝한 모델의 마스크"
    ),
    "Largest gains": "IoU가 가장 많이 오른 이미지",
    "Largest losses, or smallest gains": "IoU가 가장 많이 떨어진(또는 가장 적게 오른) 이미지",
    "What was compared": "비교 조건",
    "Model": "모델",
    "Original": "원본",
    "Fine-tuned": "파인튜닝",
    "{file} (epoch {epoch})": "{file} (에폭 {epoch})",
    "Data": "데이터",
    "Split": "데이터 분할",
    "Trained on": "학습에 쓴 이미지",
    "Masks changed since training": "학습 이후 바뀐 마스크",
    "unknown": "알 수 없음",
    "Prompt": "프롬프트",
    "one point, the deepest inside the object": "점 하나(객체 안에서 경계와 가장 먼 점)",
    "a random point in the object": "객체 안의 무작위 점 하나",
    "none: all objects in the image": "없음: 이미지의 모든 객체를 찾습니다",
    "the object's box": "객체의 박스",
    "Mask": "마스크",
    "the one of three masks that the model scores highest": (
        "마스크 셋 가운데 모델이 가장 높은 점수를 매긴 것"
    ),
    "the single mask": "단일 마스크",
    "How to reproduce it": "재현 방법",
    "Date": "일시",
    "System": "운영체제",
    "Device": "디바이스",
    "Precision": "연산 정밀도",
    "SHA-256, original": "SHA-256, 원본",
    "SHA-256, fine-tuned": "SHA-256, 파인튜닝",
    "Training settings, as recorded in the fine-tuned file": (
        "학습 설정(파인튜닝한 파일에 기록된 값)"
    ),
    "Citation and licences": "인용과 라이선스",
    "Code and checkpoints: Apache-2.0.": "코드와 체크포인트: Apache-2.0.",
    "This file contains images and file names from the data: share it only with people who may see "
    "them.": (
        "이 파일에는 데이터의 이미지와 파일 이름이 들어 있습니다. "
        "데이터를 공유해도 되는 곳에만 전달하세요."
    ),
    "For research and education only.": "연구와 교육 목적으로만 쓸 수 있습니다.",
}


LANGUAGES = ("en", "ko")

_language = "en"  # of say(), one for the whole process


def use_language(language: str) -> None:
    """Set the language of all that say() returns from now on, en or ko."""
    global _language
    _language = language


def current_language() -> str:
    """Return the language of say(), en or ko."""
    return _language


def say(text: str, **values: object) -> str:
    """Return an English text in the current language, with values in its {placeholders}."""
    return (KOREAN[text] if _language == "ko" else text).format(**values)


def system_language() -> str:
    """Return ko if the system's language is Korean, else en."""
    # The first variable that is set counts, as in POSIX; Windows sets none of them
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    name = next(filter(None, names), None)
    if name is None:
        try:
            name = locale.getlocale()[0] or ""  # "Korean_Korea" on Windows
        except ValueError:  # a locale that Python cannot parse
            name = ""
    return "ko" if re.split(r"[_.@-]", name.lower())[0] in ("ko", "korean") else "en"


def parse_language(name: str) -> str:
    """Return en or ko, as an argparse type; auto is the system's language."""
    if name == "auto":
        # A console that cannot print Korean gets English, whatever the system's language is
        name = system_language() if can_print("한글") else "en"
    if name not in LANGUAGES:
        raise argparse.ArgumentTypeError(f"must be auto, en or ko, not {name}")
    return name


def add_language_option(parser: argparse._ActionsContainer) -> None:
    """Add --language, which is en or ko."""
    parser.add_argument(
        "--language",
        type=parse_language,
        default="auto",
        metavar="{auto,en,ko}",
        help="English or Korean; auto: Korean if the system's language is Korean",
    )
